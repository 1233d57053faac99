"""How proxies of small networks are asked for in tests, quietly and on few images."""

from layercrit.proxies import measure_proxies

QUIET = {"progress": False, "device": "cpu"}


def proxies_of(network, images, **settings):
    """Proxies of a network on a probe set, with as little work as the settings leave."""
    return measure_proxies(network, images, **{"trials": 2, "hessian_images": 2, **QUIET, **settings})
