"""``python -m layercrit``, for launchers that start modules."""

from layercrit.cli import main

main()
