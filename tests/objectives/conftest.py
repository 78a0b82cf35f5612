from hypothesis import settings

# A busy machine is not a failure: the first example of a test also pays for torch's lazy initialisation.
settings.register_profile("objectives", deadline=None)
settings.load_profile("objectives")
