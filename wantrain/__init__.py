"""wantrain: train and fine-tune the Wan2.2 video family, and be able to trust what comes out."""

__version__ = "0.1.0"
