from guided_diffusion.commands.page import main

if __name__ == "__main__":
    main()
