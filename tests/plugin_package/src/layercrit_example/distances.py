import layercrit


@layercrit.distance("hellinger", upper=1.0)
def hellinger(p, q):
    """Hellinger distance: the Euclidean one between square roots, divided by the square root of 2."""
    return ((p.sqrt() - q.sqrt()).square().sum(dim=1) / 2).sqrt()
