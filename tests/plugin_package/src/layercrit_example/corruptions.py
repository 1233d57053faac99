import layercrit


@layercrit.corruption("dimming", "digital", [0.1, 0.2, 0.3, 0.4, 0.5], unit="share of the light that is lost")
def dimming(image, strength, generator):
    """All pixels darker."""
    return image * (1 - strength)
