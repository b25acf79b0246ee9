from guided_diffusion.commands.make_reference import main

if __name__ == "__main__":
    main()
