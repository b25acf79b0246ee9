from guided_diffusion.commands.download import main

if __name__ == "__main__":
    main()
