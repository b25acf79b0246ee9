from guided_diffusion.commands.sweep import main

if __name__ == "__main__":
    main()
