"""``tp-kernels bench overlap``: the cases, what they are compared with, and what is written about them."""
