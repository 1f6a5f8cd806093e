"""The pages: tables and plots made from committed figures and from the options."""
