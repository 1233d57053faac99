"""``python -m layercrit``, for launchers that start modules."""

from layercrit.cli.root import main

main()
