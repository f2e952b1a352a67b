"""Every effect of ``hostd/effects/registry.py``, over the model world.

Each mirrors what the product's verb does, in the order in which it does it, and yields wherever a crash, a
cancellation or another process may come in between. Nothing is decided here that a core decides.

An effect is a function with the product's name for it, its way back is called ``..._undo``; ``registry.py`` has all of
them. They are divided by host, and there into what is done to the container and what is done to the data.
"""
