"""How a subject is judged.

Importing this package imports nothing else: the doctor runs before anything is installed.
"""

__version__ = "0.1.0"
