"""``python -m vitexplain``."""

from .cli import main

main()
