"""Every method on teachers in closed form: the worlds, how each method trains there, one run, and its figures."""
