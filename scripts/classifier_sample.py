from guided_diffusion.commands.classifier_sample import main

if __name__ == "__main__":
    main()
