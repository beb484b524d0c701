"""Tables and figures from saved numbers; runs no model and imports no Megatron."""
