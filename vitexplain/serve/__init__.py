"""``vitexplain serve``: a page on this machine where a photo is dropped and maps of several methods are seen side by side.

``service`` does the work, without a page; ``markup`` writes what is shown; ``page`` is the layer of gradio over both, and alone
imports it. Nothing is imported here, so that a port that is taken is found before torch is loaded.
"""
