"""Runtimes: one file each, with ``open_model(artifact, threads, feeds)``.

It opens the file ``artifact["model"]`` and returns a function of no arguments that runs it once on ``feeds``, arrays by
input name, waits for it, and returns the outputs where they are: arrays, or what becomes one by ``runner.on_host``.
Inputs and outputs lie in buffers of the device, made once, as in an application that keeps its own: no copy is timed.
``artifact`` is plain data from the manifest and the target: ``device`` is "cpu" or "cuda", ``form`` a way to run there.

Where a runtime cannot run there it ends the process with one sentence (``SystemExit``), which becomes the error that
the user sees. ``runner.py`` loads these files by the word of the manifest. With it they are sent to devices alone, so
those that run there need the runtime, numpy and Python 3.8, and nothing of edgepress.
"""
