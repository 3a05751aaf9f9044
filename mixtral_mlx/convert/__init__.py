"""Any checkpoint → an MLX folder that this package, mlx-lm and LM Studio load."""
