"""Everything that breaks things on purpose: a model of the protocol, and real processes under fire."""
