"""`make gpu`: prove and measure everything on a GPU within ten minutes, from a bare checkout and without network.

The stages (`stages.py`) are programs of their own, one after another, the most important first. All that they find goes
to one folder (`folder.py`), record by record, so that a kill at any moment costs the stage that runs at most. Where
there is no GPU the same stages are rehearsed on the CPU with small inputs, so that what can break there does not break
for the first time on the machine that matters.
"""
