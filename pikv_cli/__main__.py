"""`python -m pikv_cli`: what torchrun starts."""

from pikv_cli.app import main

if __name__ == "__main__":
    main()
