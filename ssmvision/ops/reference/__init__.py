"""What the operators mean, in plain PyTorch: sequential, differentiable, float64-capable.

One module per operator: `definition` says what it computes and `adjoint` its gradient, itself differentiable. Every
backend is tested against them. `forward` and `backward` offer them as a backend: what runs where no faster one can.

Letters: b batch, k route, d channel, n state, g group of channels, l token, t step along a route, r rank of delta.
"""
