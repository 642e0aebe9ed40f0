"""The subject that ships: a dictation pipeline that loses nothing when memory runs out."""
