"""What the implementations of ⊘, here and in ``vitexplain.rules``, share."""

GUARD = 1e-9  # added to what is divided by; alone where the sum would be 0
