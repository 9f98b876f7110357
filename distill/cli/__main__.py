"""`python -m distill.cli`, the form that `accelerate launch` takes."""

from distill.cli import main

if __name__ == "__main__":
    main()
