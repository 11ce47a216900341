"""How neighborhood attention is computed: a folder a family of kernels, and what chooses among them."""
