from guided_diffusion.commands.npz_tool import main

if __name__ == "__main__":
    main()
