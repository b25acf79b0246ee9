"""``python -m guided_diffusion`` is the console command ``guided-diffusion``."""

from .commands import main

if __name__ == "__main__":
    main()
