"""One sweep over tiles of keys that makes all three gradients: five products, and an order for those of queries."""
