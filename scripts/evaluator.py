from guided_diffusion.commands.evaluator import main

if __name__ == "__main__":
    main()
