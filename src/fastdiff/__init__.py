"""fastdiff turns any diffusers text-to-image pipeline into a 1-8 step one."""

__version__ = "0.1.0"
