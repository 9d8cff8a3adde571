"""The page on which people look at the latents of a dictionary: a server on loopback, and plain HTML, CSS and JS.

::

    server    HTTP: who may ask, files of the page, answers as JSON
    site      what is shown: one latent, its examples, labels
    lists     all latents at once: histograms, filters, search
    live      the model: features of a pasted text, steered text token by token
    static/   the page itself; it fetches nothing from elsewhere
"""
