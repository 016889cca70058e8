"""`python -m wantrain COMMAND ...`, and `accelerate launch -m wantrain train ...`."""

from wantrain.commands import main

if __name__ == "__main__":
    main()
