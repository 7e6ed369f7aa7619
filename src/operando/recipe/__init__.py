"""Every setting of a run: frozen pydantic models, TOML files, `a.b=value` overrides.

One recipe is one TOML file is one arm. Variants are tagged unions (`kind = "..."`); a feature that
is off is a table that is absent. A recipe may name one `base = "other.toml"`, which it is merged
over (tables merge, everything else replaces). All mistakes are reported at once.

`run.Recipe` is the whole; `data`, `rewards`, `update`, `projection` and `mixture` are its parts.
"""
