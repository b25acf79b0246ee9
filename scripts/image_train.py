from guided_diffusion.commands.image_train import main

if __name__ == "__main__":
    main()
