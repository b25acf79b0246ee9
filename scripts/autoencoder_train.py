from guided_diffusion.commands.autoencoder_train import main

if __name__ == "__main__":
    main()
