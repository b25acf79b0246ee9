from guided_diffusion.commands.ema import main

if __name__ == "__main__":
    main()
