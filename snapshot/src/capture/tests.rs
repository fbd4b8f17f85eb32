//! Capture and restore together: over generations, with failures and cancellation at every PUT, what is restored equals what was there.
