"""What neighborhood attention is, in TensorIR."""
