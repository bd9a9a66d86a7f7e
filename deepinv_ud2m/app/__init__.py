"""
A page in the browser: upload a photograph, say what happened to it, see samples of what it was before.

.. code-block:: bash

    pip install "deepinv_ud2m[app]"
    deepinv-ud2m app
    python -m deepinv_ud2m.app --port 7861 --model photos

The page is for this computer alone: it binds to 127.0.0.1, takes one job at a time, loads nothing from
elsewhere and sends nothing there. Files are deleted an hour after they were made, and when the page ends.

- :mod:`deepinv_ud2m.app.jobs`: one job, from a file to a result.
- :mod:`deepinv_ud2m.app.restore`: samples with progress and a time limit, and DiffPIR beside them.
- :mod:`deepinv_ud2m.app.views`: what is painted, as masks and kernels; results as pictures and words.
- :mod:`deepinv_ud2m.app.page`: how the page looks. It alone needs gradio.
"""
