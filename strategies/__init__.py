"""The Flower ServerApp: who hears whom, and the relay that carries the mail. Imports no torch."""
