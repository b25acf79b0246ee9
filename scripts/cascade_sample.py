from guided_diffusion.commands.cascade_sample import main

if __name__ == "__main__":
    main()
