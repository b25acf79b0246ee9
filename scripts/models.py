from guided_diffusion.commands.models import main

if __name__ == "__main__":
    main()
