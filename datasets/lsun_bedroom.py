"""`lsun.py` under the name that openai/guided-diffusion has for it."""

from lsun import main

if __name__ == "__main__":
    main()
