"""The same curriculum in other libraries' training loops: one module a library, which nothing else imports."""
