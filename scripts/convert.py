from guided_diffusion.commands.convert import main

if __name__ == "__main__":
    main()
