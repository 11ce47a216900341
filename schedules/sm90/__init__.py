"""Forward for Hopper (sm_90a): tensor memory accelerator, warpgroup products, a softmax that hides behind them."""
