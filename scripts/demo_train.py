from guided_diffusion.commands.demo_train import main

if __name__ == "__main__":
    main()
