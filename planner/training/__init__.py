"""How a model is trained: settings, choices, what frameworks do unasked."""
