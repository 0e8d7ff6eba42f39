"""Energy and Clairaut's constant of torus geodesics over 100,000 steps of Gauss 6.

Prints the largest relative deviations, quarter by quarter: a drift would grow from one to the
next. Takes a few minutes.
"""

import torch

import darboux as dx


def main(steps: int = 100_000) -> None:
    torch.set_num_threads(1)
    torus = dx.TorusOfRevolution(R=2.0, r=1.0)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(8, 2, dtype=torch.float64, generator=g) * 6
    v = torus.random_tangent(x, generator=g)
    v = v / torus.norm(x, v)[..., None]
    run = dx.geodesic_flow(
        torus, x, v, dt=0.05, steps=steps, method="gauss6", save_every=100, progress=True
    )
    energy = dx.flows.geodesic_hamiltonian(torus).energy(run.q, run.p)
    for name, series in (("energy", energy), ("Clairaut", run.p[..., 1])):
        error = (series / series[0] - 1).abs()
        quarters = [f"{float(part.max()):.1e}" for part in error.chunk(4)]
        print(f"{name:10s} max relative deviation by quarter: {'  '.join(quarters)}")


if __name__ == "__main__":
    main()
