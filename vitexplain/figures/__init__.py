"""How figures are laid out and drawn; ``vitexplain.visualize`` is where they are had from."""
